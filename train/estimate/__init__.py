"""Memory per device and time per step of a run, predicted from its settings before anything is loaded."""

from train.estimate.advice import Change, helpful_changes
from train.estimate.devices import DEVICES, Device, this_device
from train.estimate.duration import Duration, predict_duration
from train.estimate.memory import Memory, predict_memory
from train.estimate.plan import ModelShape, Plan, plan_run, shape_from_settings, shape_of

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
