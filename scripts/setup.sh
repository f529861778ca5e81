# Sourced from the repository's root: a virtual environment in .venv that meets a requirements file, made or brought up
# to date only when pyproject.toml or that file has changed. PYTHON names the interpreter to make it with.
requirements=$1
stamp=.venv/$(cat pyproject.toml "$requirements" | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
  touch "$stamp"
fi
