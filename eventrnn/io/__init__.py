"""Model files, trained models by name, and conversion of layers from and to other libraries.

The names with an underscore are pieces of `save`. Tests and experiments sign files with them that hold no network.
"""

from eventrnn.io.evnn import from_evnn as from_evnn
from eventrnn.io.evnn import to_evnn as to_evnn
from eventrnn.io.model_file import ModelFileError as ModelFileError
from eventrnn.io.model_file import _encode as _encode
from eventrnn.io.model_file import _signature as _signature
from eventrnn.io.model_file import _to_tensors as _to_tensors
from eventrnn.io.model_file import load as load
from eventrnn.io.model_file import save as save
from eventrnn.io.named import MODELS as MODELS
from eventrnn.io.named import NamedModel as NamedModel
from eventrnn.io.named import located_model as located_model
