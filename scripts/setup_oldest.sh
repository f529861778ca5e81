# Sourced after setup.sh: `oldest` is an interpreter that has what .venv has, but the oldest transformers, `version`, that
# pyproject.toml allows, with what that needs. It is made anew only when requirements have changed.
oldest=.venv/oldest/bin/python
stamp=.venv/oldest/${stamp##*/}
version=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
if [ ! -e "$stamp" ]; then
  .venv/bin/python -m venv --clear --without-pip .venv/oldest
  packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  # behind its own packages on the path: what pip finds there and suits this transformers is not installed once more
  echo "import site; site.addsitedir('$(packages .venv/bin/python)')" > "$(packages "$oldest")/venv.pth"
  .venv/bin/python -m pip --python "$oldest" install --quiet --disable-pip-version-check "transformers==$version"
  touch "$stamp"
fi
