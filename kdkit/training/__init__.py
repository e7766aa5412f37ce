"""Training: one run from its config, stage by stage, and sweeps of runs.

From the ground up:

    objective   the named terms of the loss, their weights at a step, their sum
    model       student and adapters, with the objective as the forward pass
    rollout     the student's own text
    trainer     transformers' Trainer with distillation's counting, feeding, evaluating and saving
    stage       one stage of a run;  run: stages in order, resuming, figures at the end;  sweep: runs side by side
"""
