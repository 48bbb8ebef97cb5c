// A C++ exception: the unwinder runs RDSSPQ, a NOP where there is no shadow stack.
#include <cstdio>
#include <stdexcept>

int main()
{
    try {
        throw std::runtime_error("thrown");
    } catch (const std::exception &error) {
        std::printf("caught %s\n", error.what());
    }
}
