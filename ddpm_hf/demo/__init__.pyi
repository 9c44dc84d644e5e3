from .models import load as load
from .page import Page as Page, launch as launch
from .space import write_space as write_space
