"""``python -m llava_integration.launch MODULE_OR_SCRIPT ...``: LLaVA with the start-up hook (``hook.launch``)."""

import sys

from llava_integration.hook.launch import main

if __name__ == "__main__":
    main(sys.argv[1:])
