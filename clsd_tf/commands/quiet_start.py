"""Imported first by commands: TensorFlow and Beam without their start-up messages. Nothing else imports this."""

from __future__ import annotations

import logging
import os
import sys
import tempfile


def _import_tensorflow_quietly() -> None:
    """Imports TensorFlow without its C++ start-up messages (CPU features, absent CUDA), which help nobody here.

    They are written to file descriptor 2 before any log level applies, so that is what is turned away meanwhile.
    """
    # Level 3, since deterministic tf.data logs harmless attribute mismatches as errors; real ones raise in Python.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except BaseException:
            captured.seek(0)
            os.write(original, captured.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _drop_beam_warnings() -> None:
    """Beam warns of absent Google Cloud packages when it is imported, and without PyTorch of a module that is there."""
    noise = ("apitools", "Resource module is not available")
    logging.getLogger().addFilter(lambda record: not any(words in record.getMessage() for words in noise))


_drop_beam_warnings()
_import_tensorflow_quietly()
