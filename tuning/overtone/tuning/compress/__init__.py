"""Adapters made smaller: any delta as its most telling DCT coefficients, which a server loads as LoCA or sDCTFT."""

from overtone.tuning.compress.config import Config
from overtone.tuning.compress.curve import Point
from overtone.tuning.compress.report import Activation, ModuleReport, Report
from overtone.tuning.compress.running import compress

__all__ = ["Activation", "Config", "ModuleReport", "Point", "Report", "compress"]
