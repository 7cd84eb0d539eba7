"""Stages in order: a pipeline and its runs."""

from __future__ import annotations

from gim_stagewise.pipeline.pipeline import Pipeline, run_name
from gim_stagewise.pipeline.results import RunResult, StageResult
from gim_stagewise.pipeline.running import check_stages

__all__ = ["Pipeline", "RunResult", "StageResult", "check_stages", "run_name"]
