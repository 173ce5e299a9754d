"""MQTT topics and topic filters, as text: what matches what, and what is none (MQTT 5, section 4.7)."""

from __future__ import annotations


def topic_matches(pattern: str, topic: str) -> bool:
    """Say whether a topic filter (a `$share/group/` in front is put aside) matches a topic (MQTT 5, section 4.7)."""
    if pattern.startswith("$share/"):
        pattern = pattern.split("/", 2)[2] if pattern.count("/") >= 2 else pattern
    if topic.startswith("$") and pattern[:1] in ("+", "#"):
        return False
    levels, names = pattern.split("/"), topic.split("/")
    for position, level in enumerate(levels):
        if level == "#":
            return True
        if position >= len(names) or level not in ("+", names[position]):
            return False
    return len(levels) == len(names)


def filter_problem(pattern: str) -> str | None:
    """Say what is wrong with a topic filter; None if nothing is."""
    inner = pattern
    if pattern.startswith("$share/"):
        parts = pattern.split("/", 2)
        if len(parts) < 3 or not parts[1] or not parts[2] or any(wild in parts[1] for wild in "+#"):
            return "a shared subscription is $share/GROUP/FILTER"
        inner = parts[2]
    if not inner or "\0" in inner or len(inner.encode()) > 65535:
        return "a topic filter has 1 to 65535 bytes and no NUL"
    levels = inner.split("/")
    if any(len(level) > 1 and ("+" in level or "#" in level) for level in levels) or "#" in levels[:-1]:
        return "+ stands for one whole level, # for all that follow, at the end"
    return None
