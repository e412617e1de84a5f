"""DeepCTR-Torch as a competitor of benchmarks.training: its DeepFM, trained by its own ``fit`` with its Adam.

Runs in an environment with deepctr-torch. Its penalties are off and nothing else is changed, but the standard deviation
with which weights begin: with its own 1e-4 the MLP learns nothing in a benchmark. It has one for all: .05, as Glorot's
rule gives our layers of 400 units; our embeddings begin with .01.
"""

import importlib.metadata

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM

from benchmarks.rounds import Ready, Worker

_INIT_STD = 0.05


def main() -> None:
    worker = Worker()
    task = worker.task
    torch.set_num_threads(task.num_threads)
    arrays = np.load(task.arrays)
    names = [f"category_{index}" for index in range(task.num_features)]
    inputs = {name: arrays["ids"][:, index] for index, name in enumerate(names)}
    labels = arrays["labels"]
    worker.begin_model()
    columns = [SparseFeat(name, task.vocabulary_size, embedding_dim=task.embedding_dim) for name in names]
    model = DeepFM(
        columns,
        columns,
        dnn_hidden_units=task.hidden_units,
        l2_reg_linear=0,
        l2_reg_embedding=0,
        init_std=_INIT_STD,
    )
    model.compile(torch.optim.Adam(model.parameters(), lr=task.learning_rate), "binary_crossentropy")

    def train() -> tuple[int, float]:
        history = model.fit(inputs, labels, batch_size=task.batch_size, epochs=1, verbose=0)
        return len(labels), history.history["loss"][-1]

    versions = {name: importlib.metadata.version(name) for name in ("deepctr-torch", "torch")}
    worker.serve(train, Ready(sum(weights.numel() for weights in model.parameters()), versions))


if __name__ == "__main__":
    main()
