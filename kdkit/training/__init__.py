"""Training: `run` strings stages together, `sweep` strings runs together; each stage is a trainer over one model.

objective    the named terms of the loss, their weights at a step, their sum
model        student and adapters as one module
trainer      transformers' Trainer with distillation's counting, feeding, evaluating and saving
rollout      the student's own text
stage, run   a stage of a run; a run, from its config to its figures
"""
