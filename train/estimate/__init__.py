"""What a run will need, before it starts: memory of each device, time of each step, and what to change if it is too
much. Arithmetic over a model's shape and the run's settings; no weights are loaded."""

from train.estimate.advice import Change, helpful_changes
from train.estimate.devices import DEVICES, Device, this_device
from train.estimate.duration import Duration, predict_duration
from train.estimate.memory import Memory, predict_memory
from train.estimate.plan import Plan, plan_run
from train.estimate.shape import ModelShape, shape_from_settings, shape_of

__all__ = [
    "DEVICES",
    "Change",
    "Device",
    "Duration",
    "Memory",
    "ModelShape",
    "Plan",
    "helpful_changes",
    "plan_run",
    "predict_duration",
    "predict_memory",
    "shape_from_settings",
    "shape_of",
    "this_device",
]
