"""Day-two operations, a module for each verb: precheck, the plan, act, verify, and on failure put service back."""
