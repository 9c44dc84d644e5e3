from .onnx import OnnxNetwork as OnnxNetwork, export_onnx as export_onnx
from .pytorch_ports import (
    from_pytorch_port as from_pytorch_port,
    pipeline_from_pytorch_port as pipeline_from_pytorch_port,
)
from .stock import (
    from_stock as from_stock,
    given_class as given_class,
    pipeline_from_stock as pipeline_from_stock,
    pipeline_to_stock as pipeline_to_stock,
    state_size as state_size,
    to_stock as to_stock,
    unknown_keys as unknown_keys,
)
from .tensorflow import (
    from_tf_checkpoint as from_tf_checkpoint,
    from_tf_variables as from_tf_variables,
    pipeline_from_tf_checkpoint as pipeline_from_tf_checkpoint,
    tf_checkpoint_prefix as tf_checkpoint_prefix,
)
