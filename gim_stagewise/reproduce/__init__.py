"""The paper's tables and figures, measured."""

from __future__ import annotations
