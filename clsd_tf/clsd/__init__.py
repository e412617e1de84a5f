"""Click-confidence learning: confidence functions, AdGate, monitors and the model that trains with them."""

from clsd_tf.clsd.ad_gate import AdGate
from clsd_tf.clsd.confidence import ClsdConfig
from clsd_tf.clsd.model import ClsdModel

__all__ = ["AdGate", "ClsdConfig", "ClsdModel"]
