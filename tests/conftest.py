"""What proofs counted (``record_property("proof", "power cuts: …")``) is printed once, after the run."""

from __future__ import annotations

from collections import Counter

import pytest

_Counts = dict[str, Counter[str]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Add up the counts of all tests, also those that ran in other processes."""
    proofs: _Counts = {}
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for name, counts in getattr(report, "user_properties", ()):
            if name.startswith("proof:") and getattr(report, "when", "") == "call":
                proofs.setdefault(name[6:], Counter()).update(counts)
    for name, totals in sorted(proofs.items()):
        terminalreporter.write_line(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in totals.items()))
