"""What pyproject.toml cannot say: a wheel carries training/ as `ddpm_hf.training`, for `ddpm-hf train`.

An editable installation does not: `ddpm-hf train` finds training/ beside the package. A second entry of `package-dir`
would do for wheels, but editable installations would then be found later than a folder named ddpm_hf that lies in the
current one, which a clone is.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTraining(build_py):
    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            self.packages = [*self.packages, "ddpm_hf.training", "ddpm_hf.training.configs"]
            self.package_dir = {**self.package_dir, "ddpm_hf.training": "training"}


setup(cmdclass={"build_py": BuildWithTraining})
