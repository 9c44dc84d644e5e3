"""What identifies the model of a compressed file."""

import pytest
from diffusers.configuration_utils import register_to_config

from ddpm_hf import DDPMPaperPipeline, DDPMPaperUNet
from ddpm_hf.codec.files import model_hash


@pytest.mark.parametrize(("temperature", "same"), [(1.0, True), (0.5, False)])
def test_a_later_configuration_key_counts_only_where_it_is_not_the_default(
    tiny_unet, tiny_scheduler, temperature, same
):
    """So that files from before the key are decoded: a network with one key more, under the name of ours."""

    class Later(DDPMPaperUNet):
        @register_to_config
        def __init__(
            self,
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_resolutions=(4,),
            dropout=0.0,
            norm_num_groups=4,
            temperature=1.0,
        ):
            sizes = sample_size, in_channels, out_channels, block_out_channels, layers_per_block
            super().__init__(*sizes, attention_resolutions, dropout, norm_num_groups)

    Later.__name__ = "DDPMPaperUNet"
    plain, later = tiny_unet(), Later(temperature=temperature)
    later.load_state_dict(plain.state_dict())
    assert later.config["temperature"] == temperature
    first, second = (model_hash(DDPMPaperPipeline(unet, tiny_scheduler())) for unet in (plain, later))
    assert (first == second) is same
