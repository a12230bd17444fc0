"""The report of a comparison as a page, made from the comparison's files alone; a module for every section."""

from .page import REPORT_NAME, write_report

__all__ = ["REPORT_NAME", "write_report"]
