"""One measured build by FuxiCTR, run by an interpreter that has it: build_fuxictr.py LOG_DIR OUTPUT_DIR TIMES_JSON.

Its build_dataset fits every column of the log and writes one Parquet file of ids and scaled numbers. Every row counts
as training data: it neither splits by time nor joins.
"""

import json
import pathlib
import sys
import time

import yaml
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.preprocess.build_dataset import init_ray

_DTYPES = {"int64": "int", "string": "str", "float": "float"}


def feature_columns(spec: dict) -> list[dict]:
    types = {column["name"]: _DTYPES[column["type"]] for column in spec["tables"]["log"]["columns"]}
    columns = []
    for feature in spec["features"]:
        kind = {"type": "categorical", "min_categr_count": 1}
        if feature["type"] == "numeric":
            kind = {"type": "numeric", "normalizer": "StandardScaler"}
        columns.append({"name": feature["column"], "active": True, "dtype": types[feature["column"]], **kind})
    return columns


if __name__ == "__main__":
    log_dir, output, times = map(pathlib.Path, sys.argv[1:])
    spec = yaml.safe_load((log_dir / "feature_spec.yaml").read_text())
    init_ray()  # Its workers' start is start-up, as imports are.
    begin = time.time()
    processor = FeatureProcessor(
        feature_cols=feature_columns(spec),
        label_col={"name": "click", "dtype": "float"},
        dataset_id=output.name,
        data_root=str(output.parent),
    )
    build_dataset(processor, train_data=str(log_dir / "log.csv"))
    times.write_text(json.dumps({"begin": begin, "end": time.time()}))
