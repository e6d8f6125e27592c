"""The compiled operators as torch ones, which kernels serve, checks of arguments, and facts about the build."""
