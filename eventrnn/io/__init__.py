"""Model files, and conversion of layers from and to other libraries."""

from eventrnn.io.evnn import from_evnn as from_evnn
from eventrnn.io.evnn import to_evnn as to_evnn
from eventrnn.io.model_file import ModelFileError as ModelFileError
from eventrnn.io.model_file import load as load
from eventrnn.io.model_file import save as save
