# What every command on a machine of the cluster needs: cluster.yaml and cluster-onprem.yaml copy this
# file to ~/selffl-env.sh on each machine and read it before they start Ray. Read it yourself
# (`. ~/selffl-env.sh`) when you are logged in there.

# The folder that all machines share. If you change it, change it in the two .yaml files too.
export SELFFL_SHARED=/mnt/shared/selffl

export PATH="$HOME/selffl-venv/bin:$PATH"
# Ray starts its workers through bash, and Debian's bash reads ~/.bashrc again when it believes to be
# at the end of an ssh connection: whatever Python stands first there would be the workers' Python.
unset SSH_CLIENT SSH2_CLIENT

# Without it `ray start` is open to anybody who reaches its ports. The token is in ~/.ray/auth_token.
export RAY_AUTH_MODE=token
# Data are prepared once for all machines; without it each builds stores of its own.
export SELFFL_RAY_STORES="$SELFFL_SHARED/stores"
# The server loops of runs and trials are on the head, and so is MLflow's server: see the .yaml files.
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
# Nothing reports to anybody; MLflow's background jobs are processes that nobody here needs.
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
# Ray keeps several sockets for each actor. Where the limit cannot be raised, `selffl doctor` says so.
ulimit -n 65536 2> /dev/null || true
