from .background import BackgroundUploads as BackgroundUploads
from .card import model_card as model_card
from .loading import load_model as load_model, load_pipeline as load_pipeline
from .publishing import PublishError as PublishError, check_names as check_names, create as create, publish as publish
from .uploaded import files_to_upload as files_to_upload
