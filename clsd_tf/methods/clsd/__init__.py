"""Click-confidence learning: confidence functions, AdGate, guards, monitors and the model that trains with them."""

from clsd_tf.methods.clsd.ad_gate import AdGate
from clsd_tf.methods.clsd.config import AdGateConfig, ClsdConfig, OverconfidentTeacherWarning
from clsd_tf.methods.clsd.guards import ConfidenceGuardError
from clsd_tf.methods.clsd.model import ClsdModel

__all__ = ["AdGate", "AdGateConfig", "ClsdConfig", "ClsdModel", "ConfidenceGuardError", "OverconfidentTeacherWarning"]
