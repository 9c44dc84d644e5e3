from .__main__ import main as main
from .arguments import build_parser as build_parser
