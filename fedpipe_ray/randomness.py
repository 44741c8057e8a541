"""Random numbers that depend on what they are for, not on when or where they are drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def rng_for(seed: int, round: int, name: str) -> np.random.Generator:
    """A generator that is a function of (seed, round, name) alone."""
    digest = hashlib.blake2b(f"{seed}/{round}/{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
