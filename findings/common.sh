# What the scripts of this folder share; they source it. Needs bash, python3 and a package registry that pip reaches.
#
#   environment NAME==VERSION ...   enters a temporary folder with a fresh virtual environment of these packages
#   observe <<'PYTHON'              runs a program there, prints what it prints, and keeps it
#   expect <<'SEEN'                 exits 0 if that is the text given, else 1, with both; 2 means: could not be tried

environment() {
    FOLDER=$(mktemp -d)
    trap 'cd / && rm -rf "$FOLDER"' EXIT
    cd "$FOLDER"
    unset PYTHONPATH PYTHONHOME
    export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 HF_HOME="$FOLDER/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
    python3 -m venv venv || exit 2
    # Pip follows the settings of whoever runs this; only what is installed is ours to choose.
    venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@" >pip.log 2>&1 ||
        { cat pip.log >&2 && exit 2; }
    echo "python $(venv/bin/python -c 'import platform; print(platform.python_version())'), $*"
}

observe() {
    cat >program.py
    # An exception is a change of behaviour like any other: its last line joins the output, and so fails the comparison.
    venv/bin/python program.py >seen.txt 2>errors.txt || tail -n 1 errors.txt >>seen.txt
    sed 's/^/  /' seen.txt
}

expect() {
    cat >expected.txt
    if diff expected.txt seen.txt >difference.txt; then
        echo "as described"
    else
        printf 'CHANGED (< described, > seen now)\n%s\n' "$(cat difference.txt)"
        exit 1
    fi
}
