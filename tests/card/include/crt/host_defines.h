/* What pip's CUDA headers need of the compiler's own headers, which pip does not install, to be read by gcc. */
#pragma once
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __device__
#define __host__
#define __no_return__
#define __noinline__
#define __forceinline__
