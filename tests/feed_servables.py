"""Small SavedModels that read rows as this project's do: answers are arithmetic that a reader does in the head."""

from __future__ import annotations

import pathlib

import tensorflow as tf

from clsd_tf.data.examples import is_missing, parse_raw_examples, raw_tensor_specs
from clsd_tf.spec.model_inputs import MISSING_INT64, RawInput
from export.servable.ranking import decode_requests

RAW_INPUTS = (
    RawInput("age", "int64"),
    RawInput("price", "float"),
    RawInput("recent", "string", is_list=True),
    RawInput("user", "string"),
)


class FeedModel(tf.Module):
    """``ctr`` = scale * (age + price + letters of user + number of recent), where a missing value counts 0.

    The user "slow" takes some 50 ms. ``rank`` reads price and item_id, which is no input of ``predict_raw``, of items.
    ``single`` is ``serving_default`` with an output of another name.
    """

    def __init__(self, scale: float):
        super().__init__()
        self._scale = tf.Variable(scale, dtype=tf.float32)

    def ctr(self, age, price, recent, user) -> dict[str, tf.Tensor]:
        known_age = tf.where(age == MISSING_INT64, tf.zeros_like(age), age)
        known_price = tf.where(tf.math.is_nan(price), tf.zeros_like(price), price)
        num_recent = tf.reduce_sum(tf.cast(recent != "", tf.float32), axis=1)
        letters = tf.cast(tf.strings.length(user), tf.float32)
        num_steps = 20_000 * tf.cast(tf.reduce_any(user == "slow"), tf.int32)
        nothing = tf.while_loop(lambda step, _: step < num_steps, lambda step, x: (step + 1, x * 0.5), [0, 0.0])[1]
        return {"ctr": self._scale * (tf.cast(known_age, tf.float32) + known_price + letters + num_recent) + nothing}

    def signatures(self) -> dict:
        def from_examples(examples):
            return self.ctr(**parse_raw_examples(examples, RAW_INPUTS))

        def rank(requests):
            context, items = decode_requests(requests)
            item_row = items.value_rowids()
            entries = {entry.name: entry for entry in RAW_INPUTS}
            users = parse_raw_examples(context, RAW_INPUTS)
            of_items = parse_raw_examples(items.values, [entries["price"], RawInput("item_id", "int64")])
            shared = {name: tf.gather(values, item_row) for name, values in users.items()}
            price = tf.where(is_missing(of_items["price"]), shared.pop("price"), of_items["price"])
            ctr = items.with_values(self.ctr(price=price, **shared)["ctr"]).to_tensor(-1.0)
            ids = items.with_values(of_items["item_id"]).to_tensor(MISSING_INT64)
            order = tf.argsort(ctr, direction="DESCENDING")
            return {"item_ids": tf.gather(ids, order, batch_dims=1), "ctr": tf.gather(ctr, order, batch_dims=1)}

        def concrete(function, **specs):
            return tf.function(function, autograph=False).get_concrete_function(**specs)

        strings = tf.TensorSpec([None], tf.string)
        return {
            "serving_default": concrete(from_examples, examples=strings),
            "single": concrete(lambda examples: {"score": from_examples(examples)["ctr"]}, examples=strings),
            "rank": concrete(rank, requests=strings),
            "predict_raw": concrete(self.ctr, **raw_tensor_specs(RAW_INPUTS)),
        }


def save_feed_model(servable_dir: pathlib.Path, version: int, scale: float) -> pathlib.Path:
    """Writes servable_dir/feed/version."""
    model = FeedModel(scale)
    path = servable_dir / "feed" / str(version)
    tf.saved_model.save(model, str(path), signatures=model.signatures())
    return path
