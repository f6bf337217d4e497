"""Training: truncated BPTT with surrogate gradients, regularisers, optimisers, tasks, the training loop and runs."""

from __future__ import annotations

from eventrnn.training.bptt.gated_products import Gating as Gating
from eventrnn.training.bptt.model import Model as Model
from eventrnn.training.bptt.noise import Noise as Noise
from eventrnn.training.checkpoint import CheckpointError as CheckpointError
from eventrnn.training.checkpoint import load_checkpoint as load_checkpoint
from eventrnn.training.checkpoint import save_checkpoint as save_checkpoint
from eventrnn.training.distillation import soft_targets as soft_targets
from eventrnn.training.evaluation import evaluate as evaluate
from eventrnn.training.finetune import FineTuned as FineTuned
from eventrnn.training.finetune import FineTuning as FineTuning
from eventrnn.training.finetune import Tuning as Tuning
from eventrnn.training.finetune import at_activity as at_activity
from eventrnn.training.finetune import fine_tune as fine_tune
from eventrnn.training.gates import GateSettings as GateSettings
from eventrnn.training.gradcheck import GradientCheck as GradientCheck
from eventrnn.training.gradcheck import check_gradients as check_gradients
from eventrnn.training.losses import cross_entropy as cross_entropy
from eventrnn.training.losses import squared_error as squared_error
from eventrnn.training.optim import Optimiser as Optimiser
from eventrnn.training.optim import Schedule as Schedule
from eventrnn.training.optim import clip_by_layer as clip_by_layer
from eventrnn.training.optim import clip_by_norm as clip_by_norm
from eventrnn.training.parts import split_checkpoint as split_checkpoint
from eventrnn.training.regularisers import Regularisers as Regularisers
from eventrnn.training.run import Stopped as Stopped
from eventrnn.training.run import read_log as read_log
from eventrnn.training.run import run as run
from eventrnn.training.settings import Settings as Settings
from eventrnn.training.targets import SoftTargets as SoftTargets
from eventrnn.training.tasks import Batch as Batch
from eventrnn.training.tasks import Classification as Classification
from eventrnn.training.tasks import LanguageModelling as LanguageModelling
from eventrnn.training.tasks import Regression as Regression
from eventrnn.training.tasks import Task as Task
from eventrnn.training.trainer import Diverged as Diverged
from eventrnn.training.trainer import Progress as Progress
from eventrnn.training.trainer import Trainer as Trainer
