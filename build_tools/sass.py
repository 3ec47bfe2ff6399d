"""Reads the disassembly of GPU code: the instructions of each function, and the loops among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    predicate: str  # "@P0", "@!UP1" or empty
    opcode: str  # "LDG.E.128.CONSTANT"
    operands: str


_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
)
_FUNCTION = re.compile(r"^\s*Function : (\S+)")


def read_functions(text: str) -> dict[str, list[Instruction]]:
    """Instructions by mangled name, from what `cuobjdump -sass` prints."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            current = functions.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return functions


def _successors(instructions: Sequence[Instruction]) -> list[list[int]]:
    """Positions that may come next. Calls are taken to return, and barriers of divergence to fall through.

    A call under a condition may also be a jump that never returns: ptxas leaves loops by one on some architectures.
    """
    position = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: list[list[int]] = []
    for i, (_, predicate, opcode, operands) in enumerate(instructions):
        name = opcode.split(".")[0]
        following = [i + 1] if i + 1 < len(instructions) else []
        if name == "BRA":
            targets = re.findall(r"0x([0-9a-f]+)", operands)
            conditional = predicate or ".DIV" in opcode or re.search(r"\bU?P\d", operands)
            found.append([position[int(targets[-1], 16)], *(following if conditional else [])])
        elif name == "CALL" and ".REL" in opcode and predicate:
            targets = [int(x, 16) for x in re.findall(r"0x([0-9a-f]+)", operands)]
            found.append([*following, *(position[x] for x in targets[-1:] if x in position)])
        elif name in ("EXIT", "RET") and not predicate:
            found.append([])
        else:
            found.append(following)
    return found


def _reverse_postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    order, seen = [], {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, rest = stack[-1]
        step = next((n for n in rest if n not in seen), None)
        if step is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(step)
            stack.append((step, iter(successors[step])))
    return order[::-1]


def _dominators(order: Sequence[int], predecessors: dict[int, list[int]]) -> dict[int, int]:
    """The immediate dominator of every position (Cooper, Harvey and Kennedy's iteration)."""
    rank = {node: i for i, node in enumerate(order)}
    dominator = {order[0]: order[0]}

    def common(a: int, b: int) -> int:
        while a != b:
            while rank[a] > rank[b]:
                a = dominator[a]
            while rank[b] > rank[a]:
                b = dominator[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            known = [p for p in predecessors[node] if p in dominator]
            new = known[0]
            for other in known[1:]:
                new = common(new, other)
            if dominator.get(node) != new:
                dominator[node] = new
                changed = True
    return dominator


def natural_loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Positions of every natural loop's instructions: what can reach a jump back to a place that dominates it."""
    if not instructions:
        return []
    successors = _successors(instructions)
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in successors[node]:
            predecessors[following].append(node)
    dominator = _dominators(order, predecessors)
    rank = {node: i for i, node in enumerate(order)}

    def dominates(a: int, b: int) -> bool:
        while b not in (a, order[0]):
            b = dominator[b]
        return a == b

    bodies: dict[int, set[int]] = {}
    for node in order:
        for head in successors[node]:
            # What dominates comes first; the many jumps and steps forward need no walk to the start.
            if rank[head] > rank[node] or not dominates(head, node):
                continue
            body = bodies.setdefault(head, {head})
            left = [node]
            while left:
                member = left.pop()
                if member not in body:
                    body.add(member)
                    left += predecessors[member]
    return [frozenset(body) for body in bodies.values()]


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The loops that hold no other loop."""
    loops = natural_loops(instructions)
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    return [[instructions[i] for i in sorted(loop)] for loop in inner]
