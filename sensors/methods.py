"""Methods of the sensor backbones without slots: FOCAL's pretraining, and supervised training from scratch."""
