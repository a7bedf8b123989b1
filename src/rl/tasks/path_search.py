"""Path search: a task whose responses walk into dead ends before and after they find the goal.

A problem is a binary tree of eight nodes, given by its edges in random order, with its root and a leaf as goal:
``A>B;A>C;C>D;...?AD:``. A response walks down from the root, one token a node, ``AB,ACE,ACD,AB``, mostly into dead
ends, and goes on after it has found the goal. Behind a ``#`` it repeats the path from the goal to the root: ``#DCA``.
The steps that this path repeats are decisive; all others are *detours*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from flowgraph import final_part
from rl.errors import TaskError
from rl.records import CharSpan, Sample
from rl.tasks.base import check_integer, check_problem

NAMES = "ABCDEFGH"
"""The nodes of every problem."""

USUAL_WRONG_STEPS = 0.3
"""Probability of a wrong step in the demonstrations that the base model learned from, in every walk."""

ORACLES = ("all", "last")
"""Which occurrences of the edges that are used are decisive."""

_LEAST_DEPTH = 2
"""Edges between the root and the goal, at least."""

_LEAST_WALKS = (4, 6)
"""A demonstration has at least this number of walks, drawn uniformly, and goes on until the goal is found."""

_MOST_WALKS = 9
"""A demonstration that has not found the goal after these walks is drawn again."""

_WALK = re.compile(r"(?:^|(?<=,))[A-H]+(?=,|\Z)")
_ANSWER = re.compile(r"#([A-H]+)\Z")

Children = dict[str, list[str]]
"""Node -> its children, an empty list for a leaf."""

Edge = tuple[str, str]
"""Parent and child."""


@dataclass(frozen=True, init=False)
class PathSearch:
    """The task of path search; a problem is a function of the seed, the split and the number.

    Args:
        oracle: ``"all"`` marks every occurrence of an edge of the stated path, ``"last"`` only its last.
        seed: of the stream of problems.
        name: ``"pathsearch"``.

    Attributes:
        occurrences: the argument ``oracle``.

    Raises:
        TaskError: an option has another type or is not one of its values.

    Example:
        >>> task = PathSearch(seed=1)
        >>> sample = task.sample("train", 0)
        >>> sample.prompt, sample.answer
        ('A>F;H>E;C>A;C>G;G>B;F>H;A>D;?CB:', 'BGC')
        >>> response = "CGB,CAD,CGB#BGC"
        >>> [response[start:end] for start, end in task.oracle(sample, response)]
        ['G', 'B', 'G', 'B']
        >>> task.detours(sample, response), PathSearch(oracle="last").oracle(sample, response)
        ([(5, 6), (6, 7)], [(9, 10), (10, 11)])
    """

    occurrences: str
    seed: int
    name: str

    def __init__(self, oracle: str = "all", seed: int = 0, name: str = "pathsearch") -> None:
        if oracle not in ORACLES:
            raise TaskError(
                f"oracle: must be one of {', '.join(ORACLES)}, got {oracle!r}; 'all' marks every occurrence of a used "
                "edge, 'last' its last"
            )
        check_integer("seed", seed, "0 is the default")
        if name != "pathsearch":
            raise TaskError(f"name: must be 'pathsearch', got {name!r}; leave it out")
        object.__setattr__(self, "occurrences", oracle)
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "name", name)

    @property
    def size(self) -> None:
        """Return None: the stream is endless."""
        return None

    def sample(self, split: str, index: int) -> Sample:
        """Return problem number ``index`` of a split.

        Raises:
            TaskError: an unknown split, or a number that is not an integer of at least 0.
        """
        check_problem(split, index)
        random = Random(f"pathsearch/{self.seed}/{split}/{index}")

        # Each node hangs below a random earlier one with room; trees without a leaf deep enough are drawn again.
        names: list[str] = []
        parents: dict[str, str] = {}
        goals: list[str] = []
        while not goals:
            names = random.sample(NAMES, len(NAMES))
            parents = _random_tree(names, random)
            leaves = [name for name in names if name not in parents.values()]
            goals = [leaf for leaf in leaves if len(_path_to_root(leaf, parents)) > _LEAST_DEPTH]
        goal = random.choice(goals)

        edges = [(parent, child) for child, parent in parents.items()]
        random.shuffle(edges)
        lines = [f"{parent}>{child};" for parent, child in edges]
        return Sample(
            index=index,
            prompt="".join(lines) + f"?{names[0]}{goal}:",
            answer="".join(_path_to_root(goal, parents)),
            metadata={"root": names[0], "goal": goal, "edges": [list(edge) for edge in edges]},
        )

    def find_answer(self, completion: str) -> CharSpan | None:
        """Find the path behind a ``#`` at the end of the completion; with more text behind it there is no answer."""
        match = _stated_path(completion)
        if match is None:
            return None
        return match.span(1)

    def reward(self, sample: Sample, completion: str) -> float:
        """Return 1.0 if the stated path leads from the goal to the root over edges of the tree, else 0.0."""
        match = _stated_path(completion, sample.opening)
        if match is None:
            return 0.0
        path = match[1]
        edges = {(parent, child) for parent, child in sample.metadata["edges"]}
        connects = path[0] == sample.metadata["goal"] and path[-1] == sample.metadata["root"]
        return float(connects and edges >= set(_edges_of_path(path)))

    def oracle(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the steps of the walks that the stated path repeats, right or wrong.

        A step is a node and the one before it in its walk; its span is its node. A response that states no path
        repeats none. With ``oracle="last"`` only the last occurrence of every repeated step is marked.
        """
        used, _ = _sorted_steps(completion)
        if self.occurrences == "all":
            return [span for _, span in used]
        # Later occurrences of an edge replace earlier ones.
        return sorted(dict(used).values())

    def detours(self, sample: Sample, completion: str) -> list[CharSpan]:
        """Return the steps of the walks that the stated path does not repeat, none where no path is stated."""
        _, unused = _sorted_steps(completion)
        return [span for _, span in unused]


# Problems as data ---------------------------------------------------------------------------------------


def _random_tree(names: list[str], random: Random) -> dict[str, str]:
    """Hang every node but the first below a random earlier node with fewer than two children; return its parent."""
    parents: dict[str, str] = {}
    for position, name in enumerate(names[1:], start=1):
        taken = list(parents.values())
        parents[name] = random.choice([earlier for earlier in names[:position] if taken.count(earlier) < 2])
    return parents


def _path_to_root(node: str, parents: dict[str, str]) -> list[str]:
    """Return a node, its parent, and so on to the root."""
    path = [node]
    while path[-1] in parents:
        path.append(parents[path[-1]])
    return path


def _edges_of_path(path: str) -> list[Edge]:
    """Return the edges of a path that leads upwards."""
    return [(parent, child) for child, parent in pairwise(path)]


def _stated_path(completion: str, opening: str = "") -> re.Match[str] | None:
    """Find the path that a completion states; the end of thinking that is not closed states none.

    Args:
        completion: the response.
        opening: what the prompt wrote of the response; see :func:`flowgraph.final_part`.
    """
    match = _ANSWER.search(completion)
    if match is None or not final_part(completion, opening=opening).holds(*match.span()):
        return None
    return match


def _sorted_steps(completion: str) -> tuple[list[tuple[Edge, CharSpan]], list[tuple[Edge, CharSpan]]]:
    """Return the steps of all walks that the stated path repeats, and the others, each with its edge and its span."""
    match = _stated_path(completion)
    if match is None:
        return [], []
    path_edges = set(_edges_of_path(match[1]))
    used: list[tuple[Edge, CharSpan]] = []
    unused: list[tuple[Edge, CharSpan]] = []
    for walk in _WALK.finditer(completion.split("#", 1)[0]):
        for position in range(walk.start() + 1, walk.end()):
            edge = (completion[position - 1], completion[position])
            steps = used if edge in path_edges else unused
            steps.append((edge, (position, position + 1)))
    return used, unused


# Responses ----------------------------------------------------------------------------------------------


def demonstration(sample: Sample, random: Random, wrong_steps: float = 0.0) -> str:
    """Write a response of random walks and the path of the last walk that found the goal, without its end token.

    Args:
        sample: a problem of :class:`PathSearch`.
        random: draws the walks.
        wrong_steps: probability that a step leads to a node that is no child; the walk goes on from there.
    """
    children: Children = {name: [] for name in NAMES}
    for parent, child in sample.metadata["edges"]:
        children[parent].append(child)
    root = sample.metadata["root"]
    goal = sample.metadata["goal"]

    while True:
        walks: list[str] = []
        found = ""
        least = random.randint(*_LEAST_WALKS)
        while len(walks) < least or (not found and len(walks) < _MOST_WALKS):
            walk = _walk(root, goal, children, random, wrong_steps)
            walks.append(walk)
            if walk[-1] == goal:
                found = walk
        if found:
            return ",".join(walks) + f"#{found[::-1]}"


def _walk(root: str, goal: str, children: Children, random: Random, wrong_steps: float) -> str:
    """Walk down from the root to a leaf, with wrong steps; no node is visited twice."""
    walk = root
    while walk[-1] != goal:
        here = children[walk[-1]]
        choices = [name for name in here if name not in walk]
        # The leaf ends the walk: there is no wrong step from it.
        if here and random.random() < wrong_steps:
            choices = [name for name in NAMES if name not in walk and name not in here] or choices
        if not choices:
            break
        walk += random.choice(choices)
    return walk
