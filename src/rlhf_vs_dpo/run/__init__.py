"""How a stage runs: its frame, the MLflow store, launching, side by side, fixed arithmetic, whole files, progress, alarms."""
