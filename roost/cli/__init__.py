"""What operators and developers type: `roost COMMAND`."""

import importlib.util

if importlib.util.find_spec("rich") is None:
    raise SystemExit("roost: the command line is not fully installed\nhint: pip install 'roost[cli]'")
