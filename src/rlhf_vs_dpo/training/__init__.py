"""The training loops. They know neither MLflow nor DVC: what they measure goes to a callback `log(metrics, step)`."""
