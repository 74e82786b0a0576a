#!/bin/bash
# A training run as a SLURM job that resumes by itself when it reaches its time limit or is preempted:
#
#     sbatch --time=12:00:00 --ntasks=1 --gpus=1 slurm.sh task_finetune_mmimdb data_root=… exp_name=…
#
# SLURM sends SIGTERM 120 seconds before the end; run.py writes a checkpoint and ends with status 143; the job is
# requeued and resumes from there. The 120 seconds must suffice for an optimiser step and the checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun "${PYTHON:-python}" run.py with "$@" resume_from=auto
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
