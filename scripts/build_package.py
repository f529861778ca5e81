"""What the installed package consists of, where pyproject.toml cannot say it. Setuptools runs this."""

from setuptools.command.build_py import build_py

OF_A_CLONE = ("make_demo_data", "train_demo")  # programs that make files of data/


class BuildPackage(build_py):
    """Adds run_summarization.py to the package, and leaves out what works in a clone only."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == "h2optimizer":
            modules.append((package, "run_summarization", "run_summarization.py"))
        return [module for module in modules if module[1] not in OF_A_CLONE]
