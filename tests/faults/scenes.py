"""The merges that are disturbed: what lies in memory before, what comes of them."""

import itertools

import numpy as np

import sksm
from sksm import session
from tests.conftest import Memory
from tests.rows import content

PAGES = 24
_seeds = itertools.count(1000)


class Scene:
    """Memory before a merge, with its shadow copy, and all that must stay so."""

    def __init__(self, arrange):
        self.held, self.shadows = [], []
        self.act = sksm.merge
        self.target = arrange(self, next(_seeds))
        session.current.close()

    def memory(self, rows):
        """Hold memory with these bytes, and remember them."""
        some = Memory(len(rows))
        some.rows[:] = rows
        self.held.append(some)
        self.shadows.append(rows.copy())
        return some

    def play(self):
        """Do to the target what this scene is about."""
        return self.act(self.target.rows)

    def intact(self):
        pairs = zip(self.held, self.shadows, strict=True)
        return all(np.array_equal(some.rows, shadow) for some, shadow in pairs)

    def end(self):
        """Un-merge everything and unmap it."""
        for some in self.held:
            sksm.unmerge(some.rows)
        self.held.clear()
        session.current.close()


def first_copy(scene, seed):
    return scene.memory(content(seed, PAGES))


def second_copy(scene, seed):
    sksm.merge(first_copy(scene, seed).rows)
    return first_copy(scene, seed)


def gaps(scene, seed):
    sksm.merge(first_copy(scene, seed).rows)
    rows = content(seed, PAGES)
    rows[5:7] = content(seed + 500_000, 2)
    rows[15] = content(seed + 600_000, 1)
    return scene.memory(rows)


def zeros(scene, seed):
    rows = content(seed, PAGES)
    rows[3:9] = 0
    return scene.memory(rows)


def merged_already(scene, seed):
    some = first_copy(scene, seed)
    sksm.merge(some.rows)
    return some


def unmerging(scene, seed):
    scene.act = sksm.unmerge
    return merged_already(scene, seed)


SCENES = [first_copy, second_copy, gaps, zeros, merged_already, unmerging]
