"""Event-driven recurrent networks: work that is not done is not paid for."""
from eventrnn.network import *
