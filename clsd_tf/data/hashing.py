"""Hashes that are the same on every machine, in every process and for every number of workers."""

from __future__ import annotations

import hashlib
import hmac
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow as tf

_MAX_HASH = 2**63 - 1


def hash_keys(keys: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Hashes keys with FarmHash64; the hashes partition users and stand for them in records.

    >>> hash_keys(pa.array(["u1", "u2", "u1"])).tolist()
    [7313556432661986459, 5966768253566584890, 7313556432661986459]

    Args:
      keys: text or integers, [rows].

    Returns:
      int64 [rows], in [0, 2^63 - 1).
    """
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    encoded = pc.dictionary_encode(keys, null_encoding="encode")  # Distinct keys alone become Python objects.
    text = encoded.dictionary.cast(pa.string()).cast(pa.binary()).to_numpy(zero_copy_only=False)
    hashes = tf.strings.to_hash_bucket_fast(tf.constant(text, tf.string, shape=[len(text)]), _MAX_HASH).numpy()
    return hashes[encoded.indices.to_numpy()]


def mix_row_ids(row_ids: np.ndarray, seed: int) -> np.ndarray:
    """Hashes row ids with SplitMix64.

    >>> mix_row_ids(np.array([0, 1]), seed=0).tolist()
    [16294208416658607535, 10451216379200822465]

    Args:
      row_ids: int64 of any shape.
      seed: >= 0; another one gives other numbers.

    Returns:
      uint64 of the same shape, uniform.
    """
    with np.errstate(over="ignore"):
        value = row_ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed + 1)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def file_sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of the file at ``path`` in hex; reads it in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_user_ids(values: pa.Array, salt: bytes) -> pa.Array:
    """Replaces user ids by the first 16 hex digits of HMAC-SHA256(salt, id in UTF-8); null stays null.

    For data that is read and for requests alike: who does not know the salt cannot find out whose hash it is.

    >>> hash_user_ids(pa.array(["u1", None]), salt=b"0123456789abcdef").to_pylist()
    ['5162bddb18bda008', None]

    Args:
      values: text [rows].
      salt: at least 16 bytes, kept secret.

    Returns:
      Text [rows].
    """
    encoded = pc.dictionary_encode(values)
    hashes = [
        None if value is None else hmac.new(salt, value.encode(), hashlib.sha256).hexdigest()[:16]
        for value in encoded.dictionary.to_pylist()
    ]
    return pa.array(hashes, pa.string()).take(encoded.indices)
