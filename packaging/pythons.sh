# Sourced: `pythons` prints the interpreters to build for and to try, the oldest first. A name
# on PATH may be a shim that refuses.
pythons() {
  local minor candidate
  for minor in 11 12 13; do
    for candidate in "python3.$minor" \
      $(command -v pyenv >/dev/null && ls -d "$(pyenv root)/versions/3.$minor."*/bin/python 2>/dev/null); do
      if "$candidate" -c "import sys, venv; assert sys.version_info[:2] == (3, $minor)" 2>/dev/null; then
        echo "$candidate"
        break
      fi
    done
  done
}
