from .onnx import OnnxNetwork as OnnxNetwork, export_onnx as export_onnx
from .stock import (
    from_stock as from_stock,
    given_class as given_class,
    pipeline_from_stock as pipeline_from_stock,
    pipeline_to_stock as pipeline_to_stock,
    to_stock as to_stock,
)
from .tensorflow import (
    from_tf_checkpoint as from_tf_checkpoint,
    from_tf_variables as from_tf_variables,
    pipeline_from_tf_checkpoint as pipeline_from_tf_checkpoint,
    tf_checkpoint_prefix as tf_checkpoint_prefix,
)
