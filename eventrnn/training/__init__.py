"""Training event networks: truncated BPTT with a surrogate gradient, AdamW, and a loop for symbol models."""

from eventrnn.training.bptt import Model as Model
from eventrnn.training.loop import Progress as Progress
from eventrnn.training.loop import Settings as Settings
from eventrnn.training.loop import Trainer as Trainer
from eventrnn.training.loop import evaluate as evaluate
from eventrnn.training.noise import Noise as Noise
from eventrnn.training.optim import AdamW as AdamW
from eventrnn.training.optim import clip_by_norm as clip_by_norm
from eventrnn.training.optim import cosine_schedule as cosine_schedule
