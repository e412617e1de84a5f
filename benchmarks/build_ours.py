"""One measured build by this project: python -m benchmarks.build_ours LOG_DIR OUTPUT_DIR TIMES_JSON."""

import json
import pathlib
import sys
import time

from benchmarks.wide_log import SPEC
from clsd_tf.commands import quiet_start  # noqa: F401 - acts by being imported first.
from clsd_tf.spec.feature_spec import load_spec
from pipelines.beam.dataset import BuildConfig, build_dataset

if __name__ == "__main__":
    log_dir, output, times = map(pathlib.Path, sys.argv[1:])
    spec = load_spec(log_dir / SPEC)
    begin = time.time()
    build_dataset(spec, BuildConfig(input_dir=str(log_dir)), output)
    times.write_text(json.dumps({"begin": begin, "end": time.time()}))
