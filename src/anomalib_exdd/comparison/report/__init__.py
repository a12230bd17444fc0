"""The report of a comparison as one HTML page, made from the comparison's files alone."""

from .page import REPORT_NAME, write_report

__all__ = ["REPORT_NAME", "write_report"]
