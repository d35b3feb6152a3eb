"""From a module to groups: layers, names, the plan, and watching for change."""
