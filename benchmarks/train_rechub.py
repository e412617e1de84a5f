"""Torch-RecHub as a competitor of benchmarks.training: its DeepFM, trained by its own ``CTRTrainer`` with its Adam.

Runs in an environment with torch-rechub. Its MLP has batch normalization, which is taken out, since no other
competitor has it. Its first-order part stays: weights on embeddings instead of one per id, so that its tables are
smaller by a seventeenth; the benchmark's floor and memory share count as if they were not.
"""

import contextlib
import importlib.metadata
import os

import numpy as np
import torch
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.ranking import DeepFM
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

from benchmarks.rounds import Ready, Worker


def main() -> None:
    worker = Worker()
    task = worker.task
    torch.set_num_threads(task.num_threads)
    torch.manual_seed(0)
    arrays = np.load(task.arrays)
    names = [f"category_{index}" for index in range(task.num_features)]
    inputs = {name: np.ascontiguousarray(arrays["ids"][:, index]) for index, name in enumerate(names)}
    labels = arrays["labels"]
    generator = DataGenerator(inputs, labels)
    rows = {"x_val": inputs, "y_val": labels, "x_test": inputs, "y_test": labels}  # Not read.
    loader, _, _ = generator.generate_dataloader(**rows, batch_size=task.batch_size)
    worker.begin_model()
    features = [SparseFeature(name, task.vocabulary_size, task.embedding_dim) for name in names]
    model = DeepFM(features, features, {"dims": list(task.hidden_units), "dropout": 0.0, "activation": "relu"})
    for index, layer in enumerate(model.mlp.mlp):
        if isinstance(layer, torch.nn.BatchNorm1d):
            model.mlp.mlp[index] = torch.nn.Identity()
    trainer = CTRTrainer(model, optimizer_params={"lr": task.learning_rate})

    def train() -> tuple[int, float]:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # Its progress bar.
            return len(labels), trainer.train_one_epoch(loader)

    versions = {name: importlib.metadata.version(name) for name in ("torch-rechub", "torch")}
    worker.serve(train, Ready(sum(weights.numel() for weights in model.parameters()), versions))


if __name__ == "__main__":
    main()
