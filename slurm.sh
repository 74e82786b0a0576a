#!/bin/bash
# A training run as a SLURM job that resumes by itself when its time is up or the machine is wanted for another job:
#
#     sbatch --time=12:00:00 --ntasks=1 --gpus=1 slurm.sh task_finetune_mmimdb data_root=… exp_name=…
#
# SLURM sends SIGTERM 120 seconds before the end; run.py writes a checkpoint and ends with status 143; the job is put
# into the queue again, and resumes from there. That time has to be enough for an optimiser step and the checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun "${PYTHON:-python}" run.py with "$@" resume_from=auto
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
