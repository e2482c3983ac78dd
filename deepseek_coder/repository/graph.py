"""The order of a repository's files, from the edges between them.

A topological order does not exist: in real Python packages a quarter of the files sit in an import cycle. What is
looked for is an order in which as many files as possible stand behind what they depend on.

- `paper`: DeepSeek-Coder's algorithm 1 (section 2.2). In each weakly connected component the file with the *fewest*
  dependencies still missing comes next. The paper compares all pairs; a heap finds the same minimum in nearly linear
  time. One pass over a graph with cycles cannot see which of them a file sits in, so it also breaks edges that are in
  none.
- `feedback` (the default): only edges inside a cycle can be lost. Strongly connected components (Tarjan 1972) come in
  dependency order, and inside each one a greedy order (Eades, Lin, Smyth 1993) gives up as little as it can; files are
  then moved to better places while that helps. *Weak* edges (an import inside a function, of a type only, of a package
  as a whole) count less and are given up first.
- `path` and `random` for comparison. Random is a hash of seed and path: no global state.

Everything here is iterative and close to linear: repositories with a million files or a chain of 100,000 imports exist.
"""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Literal, get_args

Edges = dict[str, dict[str, bool]]  # path -> the paths that it depends on -> whether strongly
Method = Literal["feedback", "paper", "path", "random"]
METHODS: tuple[str, ...] = get_args(Method)

# What a strong edge is worth in weak ones, and how often the order inside a cycle is gone through for better places.
STRONG = 2
SWEEPS = 8

_TEST = re.compile(
    r"(?:^|/)(?:tests?|testing|specs?|__tests__|e2e)/"
    r"|(?:^|/)(?:test_[^/]*|conftest)\.py$"
    r"|[^/](?:_tests?|_spec|[.-]test|[.-]spec|(?<=[a-z0-9])Tests?|(?<=[a-z0-9])Spec)\.\w+$"
)


def is_test(path: str) -> bool:
    """Whether a file is a test, by the names that the languages' test tools look for."""
    return _TEST.search(path) is not None


def components(files: Iterable[str], edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The weakly connected components: each sorted, in the order of their smallest path. Unknown paths are ignored."""
    neighbours: dict[str, set[str]] = {path: set() for path in files}
    for path, dependencies in edges.items():
        for dependency in dependencies:
            if path in neighbours and dependency in neighbours:
                neighbours[path].add(dependency)
                neighbours[dependency].add(path)
    found, seen = [], set()
    for start in sorted(neighbours):
        if start in seen:
            continue
        seen.add(start)
        component = [start]
        for path in component:  # grows while it is read: a breadth-first search
            fresh = neighbours[path] - seen
            seen |= fresh
            component.extend(fresh)
        found.append(sorted(component))
    return found


def order(files: Iterable[str], edges: Edges, method: str = "feedback", seed: int = 0) -> list[list[str]]:
    """One list of paths for each weakly connected component, by their smallest path; dependencies first.

    edges: of `imports`; those to or from paths that are not in `files` are ignored. method: one of METHODS. seed: of
    the method "random". Where dependencies leave a choice, tests come last and paths in their alphabetical order
    (paper: by path alone). Raises ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is no order of files; known: {', '.join(METHODS)}")
    if method == "random":
        return [sorted(component, key=lambda path: _draw(seed, path)) for component in components(files, edges)]
    arrange: Callable[[list[str], Edges], list[str]] = {"feedback": _feedback, "paper": _paper, "path": _path}[method]
    found = components(files, edges)
    return [arrange(component, _inside(component, edges)) if len(component) > 1 else component for component in found]


def _inside(paths: Iterable[str], edges: Edges) -> Edges:
    """The edges between some paths, none of them to itself."""
    known = set(paths)
    return {
        path: {other: strong for other, strong in edges.get(path, {}).items() if other in known and other != path}
        for path in paths
    }


def _draw(seed: int, path: str) -> tuple[bytes, str]:
    return hashlib.blake2b(f"{seed}\0{path}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), path


def _path(component: list[str], edges: Edges) -> list[str]:
    return component


def _paper(component: list[str], edges: Edges) -> list[str]:
    missing = {path: len(edges[path]) for path in component}
    dependents = _dependents(edges)
    heap = [(count, path) for path, count in missing.items()]
    heapq.heapify(heap)
    ordered = []
    while heap:
        _, path = heapq.heappop(heap)
        if path not in missing:
            continue  # placed already: every fall of its in-degree pushed an entry, and the lowest came first
        del missing[path]
        ordered.append(path)
        for dependent in dependents[path]:
            if dependent in missing:
                missing[dependent] -= 1
                heapq.heappush(heap, (missing[dependent], dependent))
    return ordered


def _dependents(edges: Edges) -> dict[str, dict[str, bool]]:
    """The edges turned round."""
    found: Edges = {path: {} for path in edges}
    for path, dependencies in edges.items():
        for dependency, strong in dependencies.items():
            found[dependency][path] = strong
    return found


def _feedback(component: list[str], edges: Edges) -> list[str]:
    roots = sorted(component, key=lambda path: (is_test(path), path))
    ordered: list[str] = []
    for cycle in strongly_connected(roots, edges):
        ordered += cycle if len(cycle) == 1 else _within_cycle(cycle, _inside(cycle, edges))
    return ordered


def strongly_connected(roots: Iterable[str], edges: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    """The strongly connected components that the roots reach, dependencies first (Tarjan, with a stack of its own).

    A depth-first search, so a file's dependencies stand shortly before it.
    """
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: dict[str, None] = {}  # visited, component not complete; in the order of the visits
    for root in roots:
        if root in number:
            continue
        walk = [(root, iter(sorted(edges[root])))]
        number[root] = low[root] = len(number)
        open_[root] = None
        while walk:
            path, rest = walk[-1]
            for dependency in rest:
                if dependency not in number:
                    number[dependency] = low[dependency] = len(number)
                    open_[dependency] = None
                    walk.append((dependency, iter(sorted(edges[dependency]))))
                    break
                if dependency in open_:
                    low[path] = min(low[path], number[dependency])
            else:
                walk.pop()
                if walk:
                    low[walk[-1][0]] = min(low[walk[-1][0]], low[path])
                if low[path] == number[path]:
                    component = []
                    while path in open_:
                        component.append(open_.popitem()[0])
                    yield component


def _within_cycle(paths: list[str], edges: Edges) -> list[str]:
    """An order of one strongly connected component that leaves few, and rather weak, edges unsatisfied."""
    paths = sorted(paths, key=lambda path: (is_test(path), path))
    rank = {path: number for number, path in enumerate(paths)}
    weight = {False: 1, True: STRONG}
    before = [{rank[d]: weight[strong] for d, strong in sorted(edges[path].items())} for path in paths]
    after: list[dict[int, int]] = [{} for _ in paths]
    for node, dependencies in enumerate(before):
        for dependency, value in dependencies.items():
            after[dependency][node] = value
    return [paths[node] for node in _sweep(_greedy(before, after), before, after)]


def _greedy(before: list[dict[int, int]], after: list[dict[int, int]]) -> list[int]:
    """Eades, Lin and Smyth: what nothing is missing for goes to the front, what nothing waits for to the end, and
    otherwise to the front the file that more waits for than it misses, by the largest difference."""
    missing = [sum(values.values()) for values in before]
    waiting = [sum(values.values()) for values in after]
    heap = [(missing[node] - waiting[node], node) for node in range(len(before))]
    heapq.heapify(heap)
    front: list[int] = []
    back: list[int] = []
    placed = [False] * len(before)
    ready: list[int] = []  # nothing is missing for them, or nothing waits for them
    while len(front) + len(back) < len(before):
        if ready:
            node = ready.pop()
        else:
            score, node = heapq.heappop(heap)
            if not placed[node] and score != missing[node] - waiting[node]:
                continue  # an old entry: every change pushed a new one
        if placed[node]:
            continue
        placed[node] = True
        (back if missing[node] and not waiting[node] else front).append(node)
        for counts, neighbours in ((missing, after[node]), (waiting, before[node])):
            for other, value in neighbours.items():
                if not placed[other]:
                    counts[other] -= value
                    heapq.heappush(heap, (missing[other] - waiting[other], other))
                    if not counts[other]:
                        ready.append(other)
    return front + back[::-1]


def _sweep(nodes: list[int], before: list[dict[int, int]], after: list[dict[int, int]]) -> list[int]:
    """Moves one node after the other to where it leaves the fewest edges unsatisfied, until that changes nothing.

    A place is a number between those of its neighbours, so that a move costs no more than the node has edges.
    """
    for _ in range(SWEEPS):
        place = [0.0] * len(nodes)
        for number, node in enumerate(nodes):
            place[node] = float(number)
        moved = False
        for node in nodes:
            # Passing a dependency on the way to the end wins its weight, passing a dependent loses it.
            steps = sorted(
                [(place[other], value) for other, value in before[node].items()]
                + [(place[other], -value) for other, value in after[node].items()]
            )
            best = sum(value for at, value in steps if at < place[node])  # what is satisfied where it stands
            gap: tuple[float, float] | None = None
            if best < 0:  # then in front of all of them
                best, gap = 0, (steps[0][0] - 1, steps[0][0])
            total = 0
            for (at, value), (following, _) in pairwise([*steps, (steps[-1][0] + 1, 0)]):
                total += value
                if total > best and at < following:
                    best, gap = total, (at, following)
            if gap is not None:
                place[node] = (gap[0] + gap[1]) / 2
                moved = True
        if not moved:
            break
        nodes = sorted(nodes, key=lambda node: (place[node], node))
    return nodes
