"""Model files, trained models by name, and networks of other libraries.

The names with an underscore are pieces of `save`. Tests and experiments sign files with them that hold no network.
"""

from eventrnn.io.evnn import from_evnn as from_evnn
from eventrnn.io.evnn import to_evnn as to_evnn
from eventrnn.io.export import EXPORTS as EXPORTS
from eventrnn.io.export import export as export
from eventrnn.io.exported import ExportRefused as ExportRefused
from eventrnn.io.from_jax import from_equinox as from_equinox
from eventrnn.io.from_jax import from_flax as from_flax
from eventrnn.io.from_jax import from_haiku as from_haiku
from eventrnn.io.from_keras import from_keras as from_keras
from eventrnn.io.from_onnx import from_onnx as from_onnx
from eventrnn.io.from_torch import from_torch as from_torch
from eventrnn.io.imported import ImportRefused as ImportRefused
from eventrnn.io.imported import as_egru as as_egru
from eventrnn.io.model_file import ModelFileError as ModelFileError
from eventrnn.io.model_file import _encode as _encode
from eventrnn.io.model_file import _signature as _signature
from eventrnn.io.model_file import _to_tensors as _to_tensors
from eventrnn.io.model_file import load as load
from eventrnn.io.model_file import save as save
from eventrnn.io.named import MODELS as MODELS
from eventrnn.io.named import NamedModel as NamedModel
from eventrnn.io.named import located_model as located_model
from eventrnn.io.to_keras import to_keras as to_keras
from eventrnn.io.to_onnx import to_onnx as to_onnx
from eventrnn.io.to_torch import to_torch as to_torch
from eventrnn.io.vocabulary import OWN_VOCABULARIES as OWN_VOCABULARIES
from eventrnn.io.vocabulary import vocabulary_of as vocabulary_of
from eventrnn.io.vocabulary import with_vocabulary as with_vocabulary
